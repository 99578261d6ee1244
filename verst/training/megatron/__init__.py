"""The `megatron` backend: Megatron-Core trains, with tensor, pipeline, context, expert and data parallelism."""
