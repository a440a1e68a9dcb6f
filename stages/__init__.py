"""The programs behind the commands. They import the parts, never each other's insides."""
