"""The manners of a command: flags, files, resume, torchrun, CUDA graphs, Weights & Biases. No finance."""
