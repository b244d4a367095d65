"""What runs on a GPU: Triton kernels with their launchers, and those compiled from csrc/."""
