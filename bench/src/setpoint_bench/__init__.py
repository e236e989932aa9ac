"""The benchmark of Setpoint: tasks, methods and baselines, run side by side and compared."""
