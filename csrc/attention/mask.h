// Which keys a query row may see. Everything a mask says without reading a tensor is an interval of
// keys that moves right, one key for each row; blocks outside are skipped, blocks inside need no
// test.
#pragma once

#include <algorithm>
#include <cstdint>

#include "attention/params.h"

namespace flashkern::attention {

// One sequence of the batch: its lengths, where its packed rows start, and its diagonal.
struct Sequence {
  int64_t batch = 0;
  int64_t q_start = 0, k_start = 0;    // first row in a packed tensor, else 0
  int64_t q_length = 0, k_length = 0;  // keys from k_length on are not seen
  int64_t offset = 0;                  // row i meets key i + offset
  int64_t earlier = 0;                 // keys of a shared prompt, in front of these
};

// Of values: std::clamp hands on addresses, and nvcc keeps a stack for what they name.
FK_HOST_DEVICE inline int64_t clamped(int64_t x, int64_t low, int64_t high) {
  return x < low ? low : x > high ? high : x;
}

// A packed sequence ends where its tensor does. The host has checked that on a CPU; on a GPU nobody
// has, and a wrong number must not be an address.
FK_HOST_DEVICE inline int64_t length_of(int64_t told, int64_t left, int64_t longest) {
  return clamped(told, 0, left < longest ? left : longest);
}

FK_HOST_DEVICE inline Sequence sequence_of(const Problem& p, int64_t b) {
  Sequence s{b, 0, 0, p.seq_q, p.seq_k, 0};
  if (p.cu_seqlens_q != nullptr) {
    s.q_start = clamped(p.cu_seqlens_q[b], 0, p.packed_q);
    s.k_start = clamped(p.cu_seqlens_k[b], 0, p.packed_k);
    s.q_length = length_of(p.cu_seqlens_q[b + 1] - s.q_start, p.packed_q - s.q_start, p.seq_q);
    s.k_length = length_of(p.cu_seqlens_k[b + 1] - s.k_start, p.packed_k - s.k_start, p.seq_k);
  }
  const int64_t tensor_keys = s.k_length;
  if (p.kv_lengths != nullptr) {
    s.k_length = clamped(p.kv_lengths[b], 0, s.k_length);
  }
  s.earlier = p.shared_keys;
  if (p.shared_lengths != nullptr) {
    const auto prompt = static_cast<uint32_t>(b) / static_cast<uint32_t>(p.beams);  // 64 bits: slow
    s.earlier = clamped(p.shared_lengths[prompt], 0, p.shared_keys);
  }
  if (p.alignment == Alignment::kTopLeft) {
    s.offset = -s.earlier;
  } else {
    const bool own = p.alignment == Alignment::kOwnLength;
    s.offset = (own ? s.k_length : tensor_keys) - s.q_length;
    if (p.own_lengths != nullptr) {
      s.offset += clamped(p.own_lengths[b * p.row_beams], 0, p.own_keys);
    }
  }
  return s;
}

struct Interval {
  int64_t begin = 0, end = 0;  // empty where end <= begin

  FK_HOST_DEVICE bool empty() const { return end <= begin; }
  FK_HOST_DEVICE int64_t size() const { return empty() ? 0 : end - begin; }
};

// A window that reaches beyond every sequence, and that can be added to a row without overflow.
inline constexpr int64_t kUnreachable = int64_t{1} << 40;

// The mask of one sequence. Both ends of keys(i) grow with i, so the first and the last row of a
// block of rows bound all of it.
struct Band {
  int64_t q_length, k_length, offset, left, right;  // left, right: -1 for unbounded

  FK_HOST_DEVICE Band(const Problem& p, const Sequence& s)
      : q_length(s.q_length),
        k_length(s.k_length),
        offset(s.offset),
        left(std::min(p.window_left, int64_t{kUnreachable})),
        right(std::min(p.window_right, int64_t{kUnreachable})) {}

  FK_HOST_DEVICE int64_t first_key(int64_t row) const {
    return left < 0 ? 0 : clamped(row + offset - left, 0, k_length);
  }
  FK_HOST_DEVICE int64_t end_key(int64_t row) const {
    return right < 0 ? k_length : clamped(row + offset + right + 1, 0, k_length);
  }

  FK_HOST_DEVICE Interval keys(int64_t row) const { return {first_key(row), end_key(row)}; }
  // Keys that some row of [begin, end) sees, and keys that every one of them sees.
  FK_HOST_DEVICE Interval some_keys(int64_t begin, int64_t end) const {
    return {first_key(begin), end_key(end - 1)};
  }
  FK_HOST_DEVICE Interval all_keys(int64_t begin, int64_t end) const {
    return {first_key(end - 1), end_key(begin)};
  }

  // Rows that see some key of [begin, end).
  FK_HOST_DEVICE Interval rows(int64_t begin, int64_t end) const {
    end = std::min(end, k_length);
    Interval r{0, q_length};
    if (end <= begin) return {0, 0};
    if (right >= 0) r.begin = clamped(begin - offset - right, 0, q_length);
    if (left >= 0) r.end = clamped(end - offset + left, 0, q_length);
    return r;
  }
};

}  // namespace flashkern::attention
