"""HF checkpoints to Megatron and back, and HF checkpoints to teacher stores."""
