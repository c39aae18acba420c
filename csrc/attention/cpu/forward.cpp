// Attention forward on a CPU, float32 arithmetic: out = softmax(mask(scale Q K^T)) V, and lse.
//
// A task is (sequence, KV head, rows, split of the keys). Rows in tens and hundreds go to the
// matrix kernel (matrix.h, panel.h); the few rows of a decoding step stream the cache with dot
// products (decode.h). Where the keys of a sequence are split, each task leaves its part of each
// row, and the last one of a KV head's rows to finish merges them in order. plan.h decides all of
// it from the shape.
//
// Memory beyond inputs and outputs: O(tile) for a thread, and the parts of split rows (at most
// kSplitRows of a KV head).
//
// Dao: FlashAttention-2 (2023). Rabe and Staats: Self-attention does not need O(n^2) memory (2021).
#include "attention/cpu/forward.h"

#include <atomic>
#include <vector>

#include "attention/cpu/decode.h"
#include "attention/cpu/matrix.h"

namespace flashkern::FK_ISA {
namespace attention {

struct SequenceTasks {
  Sequence sequence;
  SequencePlan plan;
  int64_t first_task;   // of this sequence
  int64_t first_part;   // -1: not split
  int64_t first_group;  // of tasks that are merged together
};

class Launch {
 public:
  explicit Launch(const ForwardParams& p) : p_(p), parts_(plan_all(), p.value_dim) {
    if (groups_ > 0) finished_ = std::make_unique<std::atomic<int32_t>[]>(groups_);
  }

  int64_t tasks() const { return tasks_; }

  template <class T>
  void run_task(int64_t task) {
    const SequenceTasks& s = sequence_of_task(task);
    const SequencePlan& plan = s.plan;
    const int64_t local = task - s.first_task;
    const int64_t split = local % plan.splits;
    // The last rows see the most keys under a causal mask: they come first.
    const int64_t row_task = plan.row_tasks - 1 - local / plan.splits % plan.row_tasks;
    const HeadView view(p_, s.sequence, local / plan.tasks_per_head());

    const int64_t begin = row_task * plan.task_rows;
    const int64_t first_key = plan.first_key + split * plan.split_keys;
    TaskRange range{begin,
                    std::min(begin + plan.task_rows, plan.rows),
                    {first_key, first_key + plan.split_keys},
                    -1,
                    plan.splits};
    if (s.first_part >= 0) {
      range.first_part = s.first_part + (view.kv_head * plan.rows + begin) * plan.splits + split;
    }
    thread_local Scratch scratch;
    if (plan.decode) {
      DecodeTask<T> decode(p_, view, range, scratch);
      decode.run();
      deliver<T>(decode, view, range);
    } else {
      MatrixTask<T> matrix(p_, view, range, scratch);
      matrix.run();
      deliver<T>(matrix, view, range);
    }
    if (s.first_part >= 0) {
      const int64_t group = s.first_group + view.kv_head * plan.row_tasks + row_task;
      if (finished_[group].fetch_add(1, std::memory_order_acq_rel) + 1 == plan.splits) {
        merge<T>(view, range, range.first_part - split, scratch);
      }
    }
  }

 private:
  int64_t plan_all() {
    int64_t parts = 0;
    sequences_.reserve(p_.batch);
    for (int64_t b = 0; b < p_.batch; ++b) {
      const Sequence sequence = sequence_of(p_, b);
      SequenceTasks s{sequence, plan_sequence(p_, sequence), tasks_, -1, groups_};
      if (s.plan.splits > 1) {
        s.first_part = parts;
        parts += p_.kv_heads * s.plan.rows * s.plan.splits;
        groups_ += p_.kv_heads * s.plan.row_tasks;
      }
      tasks_ += p_.kv_heads * s.plan.tasks_per_head();
      if (s.plan.rows > 0) sequences_.push_back(s);
    }
    return parts;
  }

  const SequenceTasks& sequence_of_task(int64_t task) const {
    const auto after =
        std::upper_bound(sequences_.begin(), sequences_.end(), task,
                         [](int64_t t, const SequenceTasks& s) { return t < s.first_task; });
    return *(after - 1);
  }

  template <class T, class Task>
  void deliver(Task& task, const HeadView& view, const TaskRange& range) {
    task.for_each_row([&](int64_t row, RowState<float> state, const float* accumulated) {
      if (range.first_part < 0) {
        finish_row<T>(p_, view, row, state, accumulated);
      } else {
        const int64_t part = range.first_part + (row - range.row_begin) * range.part_step;
        parts_.set(part, state, accumulated);
      }
    });
  }

  template <class T>
  void merge(const HeadView& view, const TaskRange& range, int64_t first_part, Scratch& scratch) {
    scratch.reset(p_.value_dim);
    float* out = scratch.take(p_.value_dim);
    for (int64_t row = range.row_begin; row < range.row_end; ++row) {
      const int64_t part = first_part + (row - range.row_begin) * range.part_step;
      const RowState<float> state = parts_.merge(part, range.part_step, out);
      finish_row<T>(p_, view, row, state, out);
    }
  }

  const ForwardParams& p_;
  std::vector<SequenceTasks> sequences_;
  int64_t tasks_ = 0, groups_ = 0;
  Parts parts_;
  std::unique_ptr<std::atomic<int32_t>[]> finished_;
};

template <class T>
void run_forward(const ForwardParams& p, const Threads& threads) {
  Launch launch(p);
  threads.run(launch.tasks(), [&](int64_t task, int) { launch.run_task<T>(task); });
}

}  // namespace attention

void attention_forward(const flashkern::attention::ForwardParams& p, const Threads& threads) {
  if (p.dtype == DType::kFloat32) {
    attention::run_forward<float>(p, threads);
  } else if (p.dtype == DType::kBFloat16) {
    attention::run_forward<BFloat16>(p, threads);
  } else {
    attention::run_forward<Half>(p, threads);
  }
}

}  // namespace flashkern::FK_ISA
