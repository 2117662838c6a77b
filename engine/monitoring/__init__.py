"""Monitoring: drift, model performance and alarms."""
