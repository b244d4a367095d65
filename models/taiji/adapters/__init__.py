"""What is added to a trained denoiser: an image beside the text, a subject, a style."""
