"""From a parsed answer to what it brought: a ranking (search engines) or tables (SQL)."""
