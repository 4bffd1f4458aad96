"""The trainer: Megatron's flags and data, DeepSpeed's engine, SAT layers."""
