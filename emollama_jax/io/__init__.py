"""Files and processes: atomic writes, files out of wheels, worker processes. Imports only errors."""
