"""A finished student, made ready to deploy: `tutelage.export.run.export_run`."""
