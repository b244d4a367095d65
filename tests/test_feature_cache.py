"""DeepCache: what full and shallow steps compute, when each runs, what is saved and refused."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from conftest import UNET, XL, make_tiny_pipeline, unet_inputs
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from hcf.errors import HcfError, RecipeError
from hcf.feature_cache import (
    FeatureCacheConfig,
    attach,
    cache_of,
    detach,
    full_steps,
    install,
    remove,
    step_cost,
)
from hcf.feature_cache.cut import run_unet
from hcf.feature_cache.install import CACHE, timestep_value
from hcf.feature_cache.schedule import StepClock

SCHEDULERS = (
    "DDIMScheduler",
    "EulerDiscreteScheduler",
    "EulerAncestralDiscreteScheduler",
    "DPMSolverMultistepScheduler",
    "UniPCMultistepScheduler",
    "LMSDiscreteScheduler",
    "PNDMScheduler",
    "HeunDiscreteScheduler",
    "KDPM2DiscreteScheduler",
    "DPMSolverSinglestepScheduler",
)


def sample_images(pipe: Any, steps: int, guidance_scale: float = 2.0, **arguments: Any) -> Tensor:
    given = {"prompt": ["red cat", "blue dog"], "output_type": "pt", **arguments}
    generators = [torch.Generator().manual_seed(i) for i in range(2)]
    images: Tensor = pipe(
        num_inference_steps=steps, guidance_scale=guidance_scale, generator=generators, **given
    ).images
    return images


def with_scheduler(pipe: Any, name: str) -> Any:
    pipe.scheduler = getattr(diffusers, name).from_config(
        {k: v for k, v in pipe.scheduler.config.items() if k != "rescale_betas_zero_snr"}
    )
    return pipe


def test_uniform_and_power_schedules_have_as_many_full_steps() -> None:
    uniform = FeatureCacheConfig(interval=3)
    assert full_steps(uniform, 7) == (0, 3, 6)
    for steps in (1, 2, 4, 7, 10, 25, 50, 100):
        for interval in (2, 3, 5, 10):
            for center in (0.0, 0.3, 1.0):
                power = FeatureCacheConfig(interval=interval, schedule="power", center=center)
                found = full_steps(power, steps)
                assert len(found) == len(range(0, steps, interval))
                assert found[0] == 0 and list(found) == sorted(set(found)) and found[-1] < steps
    dense = full_steps(FeatureCacheConfig(interval=5, schedule="power", power=2.0), 50)
    gaps = [b - a for a, b in zip(dense, dense[1:], strict=False)]
    closest = dense[gaps.index(min(gaps))]
    assert 10 <= closest <= 20 and min(gaps) < 5 < max(gaps)


@pytest.mark.parametrize("size", [(8, 8), (9, 7)])
def test_a_shallow_step_at_its_own_inputs_is_the_full_one(
    size: tuple[int, int], tiny_pipeline: Any
) -> None:
    unet, given = tiny_pipeline.unet, unet_inputs(*size)
    with torch.no_grad():
        wanted = unet(*given).sample
        for branch in range(4):
            out, features = run_unet(unet, *given, branch=branch)
            assert torch.equal(out, wanted)
            again, same = run_unet(unet, *given, branch=branch, features=features)
            assert torch.equal(again, wanted) and same is features
            later = run_unet(
                unet, *unet_inputs(*size, timestep=461), branch=branch, features=features
            )
            assert not torch.equal(later[0], unet(*unet_inputs(*size, timestep=461)).sample)


def test_xl_residuals_masks_and_labels_are_the_unets_own(tiny_xl_pipeline: Any) -> None:
    unet, given = tiny_xl_pipeline.unet, unet_inputs()
    shapes = [(16, 8), (16, 8), (16, 4), (32, 4)]
    generator = torch.Generator().manual_seed(3)
    extra = {
        "added_cond_kwargs": XL,
        "down_block_additional_residuals": tuple(
            torch.randn(2, c, s, s, generator=generator) for c, s in shapes
        ),
        "mid_block_additional_residual": torch.randn(2, 32, 4, 4, generator=generator),
        "encoder_attention_mask": torch.arange(16).expand(2, 16) < 9,
    }
    labelled = diffusers.UNet2DConditionModel(**UNET, num_class_embeds=3).eval()
    with torch.no_grad():
        for branch in range(4):
            out, features = run_unet(unet, *given, **extra, branch=branch)
            assert torch.equal(out, unet(*given, **extra).sample)
            again, _ = run_unet(unet, *given, **extra, branch=branch, features=features)
            assert torch.equal(again, out)
        labels = torch.tensor([0, 2])
        assert torch.equal(
            run_unet(labelled, *given, class_labels=labels)[0],
            labelled(*given, class_labels=labels).sample,
        )


def test_the_shipped_unet_is_cut_at_every_branch() -> None:
    unet = diffusers.UNet2DConditionModel.from_pretrained(mini_folder() / "unet").eval()
    sample = torch.randn(1, 8, 16, 16, generator=torch.Generator().manual_seed(0))
    added = {"text_embeds": torch.ones(1, 320), "time_ids": torch.ones(1, 6)}
    given = [sample, torch.tensor([501]), torch.ones(1, 5, 192), None, None, None, None, added]
    ratios = []
    with torch.no_grad():
        wanted = unet(*given).sample
        for branch in range(6):
            out, features = run_unet(unet, *given, branch=branch)
            assert torch.equal(out, wanted)
            assert torch.equal(run_unet(unet, *given, branch=branch, features=features)[0], wanted)
            ratios.append(step_cost(unet, branch).shallow_ratio)
    assert ratios == sorted(ratios) and ratios[0] < 0.3 < ratios[-1] < 1


def mini_folder() -> Path:
    return Path(__file__).parents[1] / "models/weights/taiji-sd-mini"


@pytest.mark.parametrize("name", SCHEDULERS)
def test_at_interval_1_images_are_equal_whatever_the_scheduler(
    name: str, tiny_pipeline: Any
) -> None:
    pipe = with_scheduler(tiny_pipeline, name)
    plain = sample_images(pipe, 5)
    cache = install(pipe, FeatureCacheConfig(interval=1))
    assert torch.equal(sample_images(pipe, 5), plain)
    assert cache.memory.full_calls >= 5 and cache.memory.shallow_calls == 0


@pytest.mark.parametrize("name", SCHEDULERS)
def test_steps_are_told_by_their_timestep(name: str, tiny_pipeline: Any) -> None:
    pipe = with_scheduler(tiny_pipeline, name)
    cache = install(pipe, FeatureCacheConfig(interval=3))
    calls: list[float] = []

    def count(_: Any, args: tuple[Any, ...], kwargs: Any) -> None:
        calls.append(float(args[1]))

    handle = pipe.unet.register_forward_pre_hook(count, with_kwargs=True)
    first = sample_images(pipe, 9)
    handle.remove()
    distinct = [t for i, t in enumerate(calls) if i == 0 or t != calls[i - 1]]
    groups = {t: calls.count(t) for t in distinct}
    full = sum(groups[t] for t in distinct[::3])
    # where a step's first call had no twin in the step before, it is a full one too
    most = max(groups.values())
    spare = 0 if most == groups[distinct[0]] else most - 1
    assert full <= cache.memory.full_calls <= full + spare
    assert cache.memory.full_calls + cache.memory.shallow_calls == len(calls)
    assert torch.equal(sample_images(pipe, 9), first)


def test_images_start_afresh_and_removal_is_exact(tiny_pipeline: Any) -> None:
    unet, scheduler = tiny_pipeline.unet, tiny_pipeline.scheduler
    before = [set(vars(unet)), set(vars(scheduler))]
    plain = sample_images(tiny_pipeline, 8)
    cache = install(tiny_pipeline, FeatureCacheConfig(interval=3))
    first = sample_images(tiny_pipeline, 8)
    assert (cache.memory.full_calls, cache.memory.shallow_calls) == (3, 5)
    assert not torch.equal(first, plain)
    sample_images(tiny_pipeline, 7)
    assert torch.equal(sample_images(tiny_pipeline, 8), first)
    remove(tiny_pipeline)
    remove(tiny_pipeline)
    assert cache_of(tiny_pipeline) is None
    assert [set(vars(unet)), set(vars(scheduler))] == before
    assert torch.equal(sample_images(tiny_pipeline, 8), plain)


def test_another_scheduler_or_setting_takes_over(tiny_pipeline: Any) -> None:
    config = FeatureCacheConfig(interval=2)
    cache = install(tiny_pipeline, config)
    sample_images(tiny_pipeline, 6)
    with_scheduler(tiny_pipeline, "EulerDiscreteScheduler")
    first = sample_images(tiny_pipeline, 6)
    assert torch.equal(sample_images(tiny_pipeline, 6), first)
    assert (cache.memory.full_calls, cache.memory.shallow_calls) == (9, 9)
    assert install(tiny_pipeline, config) is cache
    other = install(tiny_pipeline, FeatureCacheConfig(interval=5))
    assert other is not cache and cache_of(tiny_pipeline) is other
    sample_images(tiny_pipeline, 11)
    assert (other.memory.full_calls, other.memory.shallow_calls) == (3, 8)
    remove(tiny_pipeline)
    assert "set_timesteps" not in vars(tiny_pipeline.scheduler)


def test_img2img_counts_the_steps_it_makes(tiny_pipeline: Any) -> None:
    pipe = diffusers.StableDiffusionImg2ImgPipeline.from_pipe(tiny_pipeline)
    pipe.set_progress_bar_config(disable=True)
    image = torch.rand(1, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    given = {"image": image.repeat(2, 1, 1, 1), "strength": 0.6}
    plain = sample_images(pipe, 15, **given)
    install(pipe, FeatureCacheConfig(interval=1))
    assert torch.equal(sample_images(pipe, 15, **given), plain)
    cache = install(pipe, FeatureCacheConfig(interval=3, schedule="power", center=0.5))
    sample_images(pipe, 15, **given)
    assert cache.memory.clock.steps == 9
    assert (cache.memory.full_calls, cache.memory.shallow_calls) == (3, 6)


def test_controlnet_residuals_reach_shallow_steps(tiny_pipeline: Any) -> None:
    torch.manual_seed(5)
    control = diffusers.ControlNetModel.from_unet(
        tiny_pipeline.unet, conditioning_embedding_out_channels=(16, 32)
    ).eval()
    for block in (*control.controlnet_down_blocks, control.controlnet_mid_block):
        torch.nn.init.normal_(block.weight, std=0.1)
    pipe = diffusers.StableDiffusionControlNetPipeline(
        **tiny_pipeline.components, controlnet=control, requires_safety_checker=False
    )
    pipe.set_progress_bar_config(disable=True)
    given = {"image": torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))}
    plain = sample_images(pipe, 6, **given)
    install(pipe, FeatureCacheConfig(interval=1))
    assert torch.equal(sample_images(pipe, 6, **given), plain)
    cache = install(pipe, FeatureCacheConfig(interval=2))
    found = sample_images(pipe, 6, **given)
    assert cache.memory.shallow_calls == 3
    without = sample_images(pipe, 6, **given, controlnet_conditioning_scale=0.0)
    assert not torch.equal(found, without)


def test_calls_of_one_step_keep_to_themselves(tiny_pipeline: Any) -> None:
    """Guidance in two calls a step, and a batch that shrinks on the way."""
    unet = tiny_pipeline.unet
    sample, _, text = unet_inputs()
    other = text.flip(0) * 2
    cache = attach(unet, FeatureCacheConfig(interval=2))
    with torch.no_grad():
        kept = [run_unet(unet, sample, 501, t)[1] for t in (text, other)]
        for t in (text, other):
            unet(sample, 501, t)
        for t, features in zip((text, other), kept, strict=True):
            found = unet(sample, 461, t).sample
            assert torch.equal(found, run_unet(unet, sample, 461, t, features=features)[0])
        assert (cache.memory.full_calls, cache.memory.shallow_calls) == (2, 2)
        for step in (421, 381):
            unet(sample, step, text)
        halved = unet(sample[:1], 341, text[:1]).sample  # full, and so is what follows at 301
        assert torch.equal(halved, run_unet(unet, sample[:1], 341, text[:1])[0])
        unet(sample, 301, text)
        assert cache.memory.full_calls == 5
        unet(sample, 999, text)  # an earlier timestep: another image
        assert cache.memory.full_calls == 6 and cache.memory.clock.step == 0


def test_a_clock_finds_its_place_in_known_timesteps() -> None:
    clock = StepClock(FeatureCacheConfig(interval=2))
    clock.restart([9.0, 7.0, 7.0, 5.0, 3.0, 1.0])
    assert [clock.tick(t) for t in (9, 7, 7, 5, 3)] == [True, False, False, True, False]
    assert clock.call == 0 and clock.steps == 5
    assert clock.tick(9) and clock.step == 0  # back to the start without notice
    clock.restart([1.0, 3.0, 5.0, 7.0])  # inversion goes upward
    assert [clock.tick(t) for t in (3, 5, 7)] == [True, False, True] and clock.steps == 3
    power = StepClock(FeatureCacheConfig(schedule="power"))
    with pytest.raises(HcfError, match="depend on all timesteps"):
        power.tick(9.0)


def test_operations_are_saved_as_reported(tiny_pipeline: Any) -> None:
    config = FeatureCacheConfig(interval=3)
    flops = []
    for cached in (False, True):
        cache = install(tiny_pipeline, config) if cached else None
        unet, given = tiny_pipeline.unet, unet_inputs()
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            for step in range(9):
                unet(given[0], 981 - 100 * step, given[2])
        flops.append(counter.get_total_flops())
    assert cache is not None
    report = cache.report(9)
    assert report.full_steps == 3 and report.shallow_ratio < 0.2
    exact = step_cost(tiny_pipeline.unet, text_length=16).speedup(config, 9)
    assert flops[0] / flops[1] == pytest.approx(exact, rel=0.01)  # batch 2, fused attention
    assert report.speedup == pytest.approx(exact, rel=0.05)
    # SD 1.5: the paper's N = 3 halves the operations and more
    with torch.device("meta"):
        sd15 = diffusers.UNet2DConditionModel(cross_attention_dim=768)
    assert step_cost(sd15).full_flop == pytest.approx(803e9, rel=0.01)
    assert step_cost(sd15).speedup(config, 50) == pytest.approx(2.55, abs=0.02)


def test_few_steps_are_warned_of_with_numbers(tiny_pipeline: Any) -> None:
    config = FeatureCacheConfig(interval=3)
    with pytest.raises(RecipeError, match="leaves nothing out of 1 steps"):
        install(tiny_pipeline, config, steps=1)
    assert cache_of(tiny_pipeline) is None
    install(tiny_pipeline, config)
    with pytest.warns(UserWarning, match=r"2 of 4 steps are full at interval 3: .* 1\.[0-9]+x"):
        sample_images(tiny_pipeline, 4)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        sample_images(tiny_pipeline, 4)  # said once
        sample_images(tiny_pipeline, 7)


def test_what_cannot_be_cut_is_refused(tiny_pipeline: Any) -> None:
    unet = tiny_pipeline.unet
    with pytest.raises(RecipeError, match="4 skip connections, 0 to 3"):
        attach(unet, FeatureCacheConfig(branch=4))
    with torch.device("meta"):
        sd15 = diffusers.UNet2DConditionModel(cross_attention_dim=768)
        headless = diffusers.UNet2DConditionModel(**UNET, mid_block_type=None)
    with pytest.raises(RecipeError, match="would still be 98% of a full one"):
        attach(sd15, FeatureCacheConfig(branch=11))
    with pytest.raises(RecipeError, match="nothing to leave out"):
        attach(headless, FeatureCacheConfig(branch=3))
    assert not any("forward" in vars(module) for module in (unet, sd15, headless))


def test_what_is_no_such_unet_is_refused(tiny_pipeline: Any) -> None:
    config = FeatureCacheConfig()
    with pytest.raises(HcfError, match="not a AutoencoderKL"):
        attach(tiny_pipeline.vae, config)
    with pytest.raises(HcfError, match="cache first, then compile"):
        attach(torch.compile(tiny_pipeline.unet), config)
    down = ("DownBlock2D", "SimpleCrossAttnDownBlock2D")
    other = diffusers.UNet2DConditionModel(**UNET | {"down_block_types": down})
    with pytest.raises(HcfError, match="cannot cut SimpleCrossAttnDownBlock2D"):
        attach(other, config)
    unet = tiny_pipeline.unet
    unet.forward = lambda *args, **kwargs: None
    with pytest.raises(HcfError, match="something is in front"):
        install(tiny_pipeline, config)
    del unet.forward
    del tiny_pipeline.unet
    tiny_pipeline.unet = None
    with pytest.raises(HcfError, match="lacks one"):
        install(tiny_pipeline, config)


def test_what_is_put_in_front_has_to_go_first(tiny_pipeline: Any) -> None:
    from accelerate import hooks

    unet = tiny_pipeline.unet
    install(tiny_pipeline, FeatureCacheConfig())
    cached = unet.forward
    unet.forward = lambda *args, **kwargs: cached(*args, **kwargs)
    with pytest.raises(HcfError, match="put in front of the cached"):
        remove(tiny_pipeline)
    unet.forward = cached
    hooks.add_hook_to_module(unet, hooks.AlignDevicesHook(execution_device="cpu"))
    images = sample_images(tiny_pipeline, 7)
    with pytest.raises(HcfError, match="put in front of the cached"):
        remove(tiny_pipeline)
    hooks.remove_hook_from_module(unet)
    assert torch.equal(sample_images(tiny_pipeline, 7), images)
    remove(tiny_pipeline)
    hooks.add_hook_to_module(unet, hooks.AlignDevicesHook(execution_device="cpu"))
    with pytest.raises(HcfError, match="something is in front"):
        install(tiny_pipeline, FeatureCacheConfig())
    hooks.remove_hook_from_module(unet)
    other = make_tiny_pipeline()
    other.scheduler = tiny_pipeline.scheduler
    install(other, FeatureCacheConfig())
    with pytest.raises(HcfError, match="replaced already"):
        install(tiny_pipeline, FeatureCacheConfig())
    assert cache_of(tiny_pipeline) is None and "forward" not in vars(unet)


def test_calls_that_cannot_be_right_are_refused(tiny_pipeline: Any) -> None:
    unet, given = tiny_pipeline.unet, unet_inputs()
    attach(unet, FeatureCacheConfig(branch=1))
    residual = [torch.zeros(2, 32, 4, 4)]
    with torch.no_grad():
        with pytest.raises(HcfError, match="T2I-Adapter"):
            unet(*given, down_intrablock_additional_residuals=residual)
        with pytest.raises(HcfError, match="T2I-Adapter"):
            unet(*given, down_block_additional_residuals=residual)
        with pytest.raises(HcfError, match="GLIGEN"):
            unet(*given, cross_attention_kwargs={"gligen": {}})
        with pytest.raises(HcfError, match=r"timesteps \[1.0, 501.0\]"):
            unet(given[0], torch.tensor([501.0, 1.0]), given[2])
    detach(unet)
    attach(unet, FeatureCacheConfig(branch=2))
    tiny_pipeline.enable_freeu(s1=0.9, s2=0.2, b1=1.2, b2=1.4)
    with torch.no_grad(), pytest.raises(HcfError, match="FreeU"):
        unet(*given)
    tiny_pipeline.disable_freeu()
    with torch.no_grad():
        unet(*given)
    with pytest.raises(HcfError, match=r"restart\(\) the feature cache"):
        for _ in range(20):
            unet(*given)
    assert timestep_value(torch.tensor(7)) == timestep_value(7) == 7.0


def test_copies_and_adapters_run_their_own_layers(tiny_pipeline: Any) -> None:
    from peft import LoraConfig

    unet, given = tiny_pipeline.unet, unet_inputs()
    install(tiny_pipeline, FeatureCacheConfig(interval=2))
    copies = copy.deepcopy(unet), copy.deepcopy(tiny_pipeline.scheduler)
    unet.add_adapter(
        LoraConfig(r=2, target_modules=["to_q", "conv_in", "conv_out"], init_lora_weights=False)
    )
    later = [given[0], torch.full((2,), 461.0), given[2]]
    with torch.no_grad():
        for options in (None, {"scale": 0.5}):
            cache = cache_of(tiny_pipeline)
            assert cache is not None
            cache.restart()
            plain = type(unet).forward(unet, *given, cross_attention_kwargs=options).sample
            assert torch.equal(unet(*given, cross_attention_kwargs=options).sample, plain)
            features = run_unet(unet, *given, cross_attention_kwargs=options)[1]
            wanted = run_unet(unet, *later, cross_attention_kwargs=options, features=features)[0]
            found = unet(*later, cross_attention_kwargs=options).sample
            assert torch.equal(found, wanted)
        unadapted = type(unet).forward(copies[0], *given).sample
        assert torch.equal(copies[0](*given).sample, unadapted)
        assert not torch.equal(unadapted, type(unet).forward(unet, *given).sample)
    copies[1].set_timesteps(3)
    assert len(copies[1].timesteps) == 3


def test_tracing_and_signatures_see_the_unets_own(tiny_pipeline: Any) -> None:
    import inspect

    from hcf.trace import record_calls

    unet, scheduler = tiny_pipeline.unet, tiny_pipeline.scheduler
    before = inspect.signature(unet.forward), inspect.signature(scheduler.set_timesteps)
    options = {"steps": 2, "guidance_scale": 2.0, "seed": 0}
    plain = record_calls(tiny_pipeline, ["red cat"], **options)
    install(tiny_pipeline, FeatureCacheConfig(interval=2))
    assert before == (inspect.signature(unet.forward), inspect.signature(scheduler.set_timesteps))
    with pytest.warns(UserWarning, match="1 of 2 steps"):
        found = record_calls(tiny_pipeline, ["red cat"], **options)
    assert torch.equal(found[0].sample, plain[0].sample) and len(found) == len(plain)
    # the entries of the scheduler's table are told by their place
    cache = cache_of(tiny_pipeline)
    assert cache is not None
    scheduler.set_timesteps(4)
    cache._values = [4.0, 3.0, 2.0, 1.0]
    assert [cache._value(t) for t in scheduler.timesteps] == cache._values
    assert cache._value(scheduler.timesteps[2].expand(3)) == 2.0
    assert cache._value(scheduler.timesteps[2].clone()) == float(scheduler.timesteps[2])


def test_compiling_comes_after(tiny_pipeline: Any) -> None:
    import torch._dynamo
    from torch._dynamo.testing import CompileCounter

    torch._dynamo.reset()
    unet, given = tiny_pipeline.unet, unet_inputs()
    attach(unet, FeatureCacheConfig(interval=2))
    counter = CompileCounter()
    compiled = torch.compile(unet, backend=counter)
    with torch.no_grad():
        for step in (501, 461):
            found = compiled(given[0], torch.full((2,), float(step)), given[2]).sample
        features = run_unet(unet, *given)[1]
        later = [given[0], torch.full((2,), 461.0), given[2]]
        wanted = run_unet(unet, *later, features=features)[0]
        assert torch.allclose(found, wanted, atol=1e-5) and counter.op_count > 50
        unet.compile(backend=counter)
        cache = unet.__dict__[CACHE]
        cache.restart()
        assert torch.equal(unet(*later).sample, compiled(*later).sample)
        assert (cache.memory.full_calls, cache.memory.shallow_calls) == (3, 1)
        detach(unet)
        plain = type(unet).forward(unet, *later).sample
        for again in (unet, compiled):
            assert torch.allclose(again(*later).sample, plain, atol=1e-5)
        with pytest.raises(HcfError, match="something is in front"):
            attach(unet, FeatureCacheConfig())
    torch._dynamo.reset()


def test_the_shipped_model_keeps_its_pictures() -> None:
    from hcf.artifact import Sampling
    from hcf.quality.fidelity import fidelity
    from hcf.quality.sampling import generate_images
    from hcf.source import open_pipeline

    pipe = open_pipeline(mini_folder())
    sampling = Sampling(steps=20, guidance_scale=3.0)
    arguments = ["红色的圆", "two blue squares"], [0, 1]
    plain = generate_images(pipe, *arguments, sampling=sampling)
    found = {}
    for interval in (2, 5):
        cache = install(pipe, FeatureCacheConfig(interval=interval))
        images = generate_images(pipe, *arguments, sampling=sampling)
        found[interval] = fidelity(plain, images).psnr_db
        assert cache.memory.full_calls == 20 // interval
    assert found[2] > found[5] > 12 and found[2] > 18
