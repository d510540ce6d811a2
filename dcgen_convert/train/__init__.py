"""Training: the objective, the DeepSpeed engine, checkpoints, and the stages that use them (align head, adapt)."""
