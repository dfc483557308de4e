"""What happened to runs, jobs, models and deployments: one SQLite file under the root."""
