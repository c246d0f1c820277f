"""The command line: a table of commands and one file for a group of them."""
