// Attention forward on a CPU, float32 arithmetic: out = softmax(mask(scale Q K^T)) V, and lse.
//
// A task is (sequence, KV head, rows, split of the keys). Rows in tens and hundreds go to the
// matrix kernel (matrix.h, panel.h); the few rows of a decoding step stream the cache with dot
// products (decode.h). Where the keys of a sequence are split, each task leaves its part of each
// row, and the last one of a KV head's rows to finish merges them in order. plan.h decides all of
// it from the shape.
//
// Beams that share the keys of a prompt are one set: tasks for the shared keys, with the rows of
// all beams packed, and tasks for each beam's own keys leave parts of the same rows.
//
// Memory beyond inputs and outputs: O(tile) for a thread, and the parts of split rows (at most
// kSplitRows of a KV head).
//
// Dao: FlashAttention-2 (2023). Rabe and Staats: Self-attention does not need O(n^2) memory (2021).
#include "attention/cpu/forward.h"

#include <atomic>
#include <optional>
#include <vector>

#include "attention/cpu/decode.h"
#include "attention/cpu/matrix.h"

namespace flashkern::FK_ISA {
namespace attention {

// The rows of one sequence and the keys that they meet here: all of theirs, or of a set of beams
// those that it shares, or a beam's own.
struct SequenceTasks {
  const ForwardParams* params;
  Sequence sequence;
  SequencePlan plan;
  int64_t first_task;         // of this sequence
  int64_t first_part = -1;    // of the first row; -1: rows are finished by the task
  int64_t row_parts = 1;      // of each row
  int64_t earlier_parts = 0;  // of them, those of shared keys
  int64_t first_group = 0;    // of tasks that are merged together
  int64_t set = -1;           // of beams: where its shared keys stand among the sequences
  int64_t set_tasks = 0;      // of one KV head of the set
  bool shared = false;        // keys of the set
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
    const HeadView view(*s.params, s.sequence, local / plan.tasks_per_head());

    const int64_t begin = row_task * plan.task_rows;
    const int64_t first_key = plan.first_key + split * plan.split_keys;
    const TaskRange range{begin,
                          std::min(begin + plan.task_rows, plan.rows),
                          {first_key, first_key + plan.split_keys}};
    thread_local Scratch scratch;
    if (plan.decode) {
      DecodeTask<T> decode(*s.params, view, range, scratch);
      decode.run();
      deliver<T>(decode, s, view, split);
    } else {
      MatrixTask<T> matrix(*s.params, view, range, scratch);
      matrix.run();
      deliver<T>(matrix, s, view, split);
    }
    if (s.first_part >= 0) finish_task<T>(s, view, row_task, scratch);
  }

 private:
  int64_t plan_all() {
    if (p_.shared.key.data != nullptr) shared_ = shared_part(p_);
    sequences_.reserve(p_.batch + (shared_ ? p_.batch / p_.beams : 0));
    for (int64_t b = 0; b < p_.batch; ++b) {
      if (shared_ && b % p_.beams == 0) plan_set(b / p_.beams);
      if (!shared_) plan_alone(b);
    }
    return part_count_;
  }

  SequenceTasks next(const ForwardParams& p, int64_t b) {
    const Sequence sequence = sequence_of(p, b);
    SequenceTasks s{&p, sequence, plan_sequence(p, sequence, kMultipliesTiles), tasks_};
    s.first_group = groups_;
    tasks_ += p.kv_heads * s.plan.tasks_per_head();
    return s;
  }

  void leave_parts(SequenceTasks& s, int64_t row_parts) {
    s.first_part = part_count_;
    s.row_parts = row_parts;
    part_count_ += p_.kv_heads * s.plan.rows * row_parts;
  }

  void plan_alone(int64_t b) {
    SequenceTasks s = next(p_, b);
    if (s.plan.splits > 1) {
      leave_parts(s, s.plan.splits);
      groups_ += p_.kv_heads * s.plan.row_tasks;
    }
    if (s.plan.rows > 0) sequences_.push_back(s);
  }

  void plan_set(int64_t number) {
    const auto set = static_cast<int64_t>(sequences_.size());
    SequenceTasks shared = next(*shared_, number);
    shared.set = set;
    shared.shared = true;
    shared.first_part = part_count_;
    shared.set_tasks = shared.plan.tasks_per_head();
    sequences_.push_back(shared);
    for (int64_t beam = 0; beam < p_.beams; ++beam) {
      SequenceTasks s = next(p_, number * p_.beams + beam);
      s.set = set;
      s.earlier_parts = shared.plan.splits;
      leave_parts(s, s.earlier_parts + s.plan.splits);
      sequences_[set].set_tasks += s.plan.tasks_per_head();
      sequences_.push_back(s);
    }
    groups_ += p_.kv_heads;
  }

  const SequenceTasks& sequence_of_task(int64_t task) const {
    const auto after =
        std::upper_bound(sequences_.begin(), sequences_.end(), task,
                         [](int64_t t, const SequenceTasks& s) { return t < s.first_task; });
    return *(after - 1);
  }

  // The first part of a row of a sequence that leaves parts.
  static int64_t part_of(const SequenceTasks& s, int64_t kv_head, int64_t row) {
    return s.first_part + (kv_head * s.plan.rows + row) * s.row_parts;
  }

  template <class T, class Task>
  void deliver(Task& task, const SequenceTasks& s, const HeadView& view, int64_t split) {
    task.for_each_row([&](int64_t row, RowState<float> state, const float* accumulated) {
      if (s.first_part < 0) {
        finish_row<T>(p_, view, row, state, accumulated);
      } else if (s.shared) {
        const SequenceTasks& own = sequences_[s.set + 1 + view.beam_of(row)];
        const int64_t own_row = view.query_of(row) * view.group + row % view.group;
        parts_.set(part_of(own, view.kv_head, own_row) + split, state, accumulated);
      } else {
        const int64_t part = part_of(s, view.kv_head, row) + s.earlier_parts + split;
        parts_.set(part, state, accumulated);
      }
    });
  }

  // Whoever is the last of those that left parts of the same rows merges them.
  template <class T>
  void finish_task(const SequenceTasks& s, const HeadView& view, int64_t row_task,
                   Scratch& scratch) {
    const bool alone = s.set < 0;
    const int64_t tasks = alone ? s.plan.splits : sequences_[s.set].set_tasks;
    const int64_t group =
        s.first_group + (alone ? view.kv_head * s.plan.row_tasks + row_task : view.kv_head);
    if (finished_[group].fetch_add(1, std::memory_order_acq_rel) + 1 < tasks) return;
    if (alone) {
      const int64_t begin = row_task * s.plan.task_rows;
      merge<T>(s, view.kv_head, begin, std::min(begin + s.plan.task_rows, s.plan.rows), scratch);
      return;
    }
    for (int64_t beam = 0; beam < p_.beams; ++beam) {
      const SequenceTasks& own = sequences_[s.set + 1 + beam];
      merge<T>(own, view.kv_head, 0, own.plan.rows, scratch);
    }
  }

  template <class T>
  void merge(const SequenceTasks& s, int64_t kv_head, int64_t begin, int64_t end,
             Scratch& scratch) {
    const HeadView view(p_, s.sequence, kv_head);
    scratch.reset(p_.value_dim);
    float* out = scratch.take(p_.value_dim);
    for (int64_t row = begin; row < end; ++row) {
      const RowState<float> state = parts_.merge(part_of(s, kv_head, row), s.row_parts, out);
      finish_row<T>(p_, view, row, state, out);
    }
  }

  const ForwardParams& p_;
  std::optional<ForwardParams> shared_;
  std::vector<SequenceTasks> sequences_;
  int64_t tasks_ = 0, groups_ = 0, part_count_ = 0;
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
  if (p.dtype == DType::kBFloat16) return attention::run_forward<BFloat16>(p, threads);
#ifdef FK_TILES_ALONE
  avx512_bf16::attention_forward(p, threads);  // the other types are not multiplied by tiles
#else
  if (p.dtype == DType::kFloat32) return attention::run_forward<float>(p, threads);
  attention::run_forward<Half>(p, threads);
#endif
}

}  // namespace flashkern::FK_ISA
