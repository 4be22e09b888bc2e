"""Where speed, memory and bytes are measured; see README.md."""
