"""What every result file has: machine and versions, rows, tables, drawings."""
