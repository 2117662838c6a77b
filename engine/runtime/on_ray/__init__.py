"""Ray: the cluster, work units on its workers, and jobs on a running cluster. Only this room imports `ray`."""
