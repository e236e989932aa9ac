"""`python -m setpoint`: the command line, where its script is not on the path."""

from setpoint.cli import app

if __name__ == "__main__":
    app(prog_name="setpoint")
