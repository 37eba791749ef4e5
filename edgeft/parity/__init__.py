"""Is what ships what was trained? Token identity, scoring against a reference, paired statistics, limits."""
