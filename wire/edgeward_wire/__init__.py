"""What crosses between device, cloud and operator: types, and no input or output.

One concept is one file. Every document is frozen, bounded, and valid once constructed.
Signed documents refuse unknown fields; all others tolerate them, so that neighbours two
minor versions apart still understand each other.
"""

__version__ = "0.1.0"
