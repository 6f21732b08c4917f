"""What a search found, kept so that no quota is spent on it twice: in memory, on disk, by the fleet, on record."""

from rewarders.cache.search_cache import CacheStats, SearchCache

__all__ = ["CacheStats", "SearchCache"]
