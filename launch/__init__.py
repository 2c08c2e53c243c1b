"""The front door: the command line and the processes it starts."""
