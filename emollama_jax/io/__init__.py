"""Reading and writing: paths (local and in object stores), atomic writes, checksums, JSON lines, files out of wheels,
worker processes, the chat-completions client. Imports only errors."""
