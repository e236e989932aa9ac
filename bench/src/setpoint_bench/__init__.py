"""The benchmark of Setpoint: tasks, methods and open-loop baselines, run side by side and compared."""
