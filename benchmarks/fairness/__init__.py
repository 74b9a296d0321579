"""Fair subspaces measured: closed forms, LEACE, rows left out, digits with a planted group, the gap query."""
