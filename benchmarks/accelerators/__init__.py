"""What goes on GPUs: under TensorFlow, or exported to machines with JAX."""
