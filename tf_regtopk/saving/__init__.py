"""Files of the replicas' state and of configurations."""
