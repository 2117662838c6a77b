"""Ray: the cluster, work units over its workers, and jobs on a running one. Imports of `ray` are here and nowhere else."""
