"""The student and the teachers' layers on Megatron-Core.  The only folder that imports megatron."""
