"""Where and how a run happens: directory and record, storage, tracking, cluster."""
