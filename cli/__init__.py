"""The command line: one file per command. Each reads arguments, calls one library function and prints."""
