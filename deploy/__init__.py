"""Starting things: the command line, the local launcher, and (later) Ray, SLURM and Kubernetes."""
