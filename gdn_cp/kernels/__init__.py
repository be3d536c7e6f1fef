"""The mathematics on one device: varlen batches, initial states, no ranks."""
