"""How good the images are: against the baseline, against real art, against the caption.

`fidelity` PSNR and SSIM, `frechet` FED, `clip_score` CLIP-zh and retrieval, `rules` the shapes
world, `gate` thresholds and the verdict. `judge_training` makes the judge's heads.
"""
