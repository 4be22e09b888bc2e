"""The distribution of work: who talks to whom, and by which collectives."""
