"""The optimizers that Keras holds."""
