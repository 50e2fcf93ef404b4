"""The commands of `lm.cli`, one module each: read arguments, call the rooms, show what came out.

A module's `run(arguments) -> int` does the command and returns its exit status.
"""
