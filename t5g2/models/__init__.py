"""The model: shapes in, arrays out. No mesh, no file, no gin, no seqio."""
