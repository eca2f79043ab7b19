"""Where files lie: on this machine, behind HTTP, in object stores and on the Hub."""
