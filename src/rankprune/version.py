"""The version, for packaging and for files that record it."""

VERSION = "0.1.0"
