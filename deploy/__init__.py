"""Starting things: the command line, the launchers (this machine, Ray), and (later) SLURM and Kubernetes."""
