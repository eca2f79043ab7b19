"""File access: on this machine, over HTTP, in object stores and on the Hub."""
