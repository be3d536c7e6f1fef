"""The Megatron-Core module, its layer specs, and its core attention for context parallelism."""
