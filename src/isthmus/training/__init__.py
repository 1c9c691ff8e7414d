"""Stages of training: the step that is trained, the loop around it, checkpoints and logs."""
