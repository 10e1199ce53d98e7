"""The mathematics of diffusion: noise schedules, the process, losses, guidance, samplers and augmentation."""
