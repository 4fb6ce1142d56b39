"""The command `ezmia`: one file per subcommand.

May import everything but the callbacks; nobody imports it. The public name is the command itself.
"""

__all__: list[str] = []
