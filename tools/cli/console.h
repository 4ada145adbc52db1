// What a subcommand talks to: streams, terminal, Ctrl-C. Tests pass their own.
#ifndef HW_TOOLS_CLI_CONSOLE_H_
#define HW_TOOLS_CLI_CONSOLE_H_

#include <functional>
#include <istream>
#include <mutex>
#include <ostream>
#include <utility>

namespace headwater {

// Ctrl-C as a value. Thread-safe.
class Interrupt {
 public:
  // Counts one Ctrl-C and runs the handler with the count, on this thread; the handler must not wait. False:
  // no handler is set, so nothing is under way that needs an orderly end.
  bool Raise() {
    const std::lock_guard<std::mutex> lock(mutex_);
    ++count_;
    if (handler_) handler_(count_);
    return handler_ != nullptr;
  }
  bool raised() const {
    const std::lock_guard<std::mutex> lock(mutex_);
    return count_ > 0;
  }

  // Sets the handler while it lives; one at a time. Runs it at once if Ctrl-C came before.
  class Scope {
   public:
    Scope(Interrupt* interrupt, std::function<void(int)> handler) : interrupt_(interrupt) {
      const std::lock_guard<std::mutex> lock(interrupt_->mutex_);
      if (interrupt_->count_ > 0) handler(interrupt_->count_);
      interrupt_->handler_ = std::move(handler);
    }
    ~Scope() {
      const std::lock_guard<std::mutex> lock(interrupt_->mutex_);
      interrupt_->handler_ = nullptr;
    }
    Scope(const Scope&) = delete;
    Scope& operator=(const Scope&) = delete;

   private:
    Interrupt* const interrupt_;
  };

 private:
  mutable std::mutex mutex_;
  int count_ = 0;
  std::function<void(int)> handler_;
};

struct Console {
  std::istream& in;
  std::ostream& out;
  std::ostream& err;
  bool err_is_terminal = false;
  int width = 80;  // columns of the terminal
  Interrupt* interrupt = nullptr;
};

}  // namespace headwater

#endif  // HW_TOOLS_CLI_CONSOLE_H_
