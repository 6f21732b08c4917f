"""Running SQL that a model wrote: a pool of jailed processes, and the remembered results of gold queries."""
