// Poisoned memory between the pieces of a workspace, where the address sanitizer is on: it finds what is read or written
// beyond a piece, which would else only be the next piece.
#pragma once
#include <stddef.h>

#if defined(__has_feature)
#if __has_feature(address_sanitizer)
#define FENCED 1
#endif
#endif
#if defined(__SANITIZE_ADDRESS__)
#define FENCED 1
#endif

#ifdef FENCED
#include <sanitizer/asan_interface.h>
constexpr size_t FENCE = 256;
static inline void close_memory(char* from, size_t bytes) { __asan_poison_memory_region(from, bytes); }
static inline void open_memory(char* from, size_t bytes) { __asan_unpoison_memory_region(from, bytes); }
#else
constexpr size_t FENCE = 0;
static inline void close_memory(char*, size_t) {}
static inline void open_memory(char*, size_t) {}
#endif
