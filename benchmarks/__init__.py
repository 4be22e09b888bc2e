"""Where speed, memory and bytes are measured, a folder for each subject."""
