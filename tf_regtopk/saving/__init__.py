"""What is saved of the replicas' state, and how it comes back."""
